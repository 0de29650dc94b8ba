"""Files that are whole or not there, and the cache of what was compiled before."""
