"""The commands of `fromscratch`, by subject; none imports a heavy library before it needs it."""
