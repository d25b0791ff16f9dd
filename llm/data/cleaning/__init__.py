"""The passes and steps of the `clean` stage."""
