"""What runs on the scanner: from a probe's feed to hints and answers over ZeroMQ; nothing here needs torch."""
