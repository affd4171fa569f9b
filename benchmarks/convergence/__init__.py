"""Does acceleration pay? All problems of `models.problems`, each with all contenders."""
