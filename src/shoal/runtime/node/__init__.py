"""The real interpreter of what the cores of one device want: links, timers, a disk, a clock."""
