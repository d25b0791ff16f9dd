"""The steps and passes of the clean stage."""
