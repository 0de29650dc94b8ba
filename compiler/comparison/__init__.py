"""`enginesmith compare`: two bundles or engines side by side, in results and in speed, with a verdict on the second."""
