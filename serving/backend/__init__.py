"""What runs within the server."""
