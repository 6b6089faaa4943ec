"""Message dropout where batches are made: the DataLoader's collate, keyed datasets, batches of columns."""
