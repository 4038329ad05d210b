"""Other people's libraries on these kernels; each module imports its library when it is imported itself."""
