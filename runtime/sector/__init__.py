"""Where on a screen the live ultrasound is: evidence, outline, search, and a tracker that locks and checks again."""
