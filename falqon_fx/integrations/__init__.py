"""Other libraries' training loops: each module here imports the library it is named after."""
