"""The commands that answer requests: a server, and a conversation in the terminal."""
