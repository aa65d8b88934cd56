"""What changes the blocks themselves: sharing their weights."""
