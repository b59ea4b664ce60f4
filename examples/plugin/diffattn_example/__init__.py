"""An example of a package that brings a study and an attention backend to diffattn."""
