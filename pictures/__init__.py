"""Image and mask files: finding, pairing, reading, writing, holes, views, folders and shards."""
