"""Shards on other disks and in remote stores, checked by sha256. In no code digest."""
