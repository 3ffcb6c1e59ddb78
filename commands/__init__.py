"""The commands of `majicflux`, a module each."""
