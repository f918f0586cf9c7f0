"""The small teacher that ships with the project, and the encoders that measure it."""
