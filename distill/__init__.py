"""A large teacher into a small student."""
