"""The forms in which people have images, one file each, recognised by content."""
