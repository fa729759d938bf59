"""Channel attention: every channel of a head attends to that head's channels."""
