"""Workers: processes that own a device and make the clips of the store's jobs."""
