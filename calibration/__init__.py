"""What is measured from data: phantoms with exact truth, conversations, activation ranges, confidence."""
