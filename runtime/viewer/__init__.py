"""The viewer: a bridge from the server's endpoints to one local page, which shows pictures, hints and answers."""
