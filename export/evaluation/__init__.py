"""How well models answer: reports, diagnoses and questions, several systems side by side on the same cases."""
