"""What a run will take of a device, in bytes and seconds, before it begins."""
