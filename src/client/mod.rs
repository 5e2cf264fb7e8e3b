//! Client commands: the API from the command line.
