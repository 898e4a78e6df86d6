"""What links and devices are like: measured by those who use them, told to the others, every figure with its age."""
