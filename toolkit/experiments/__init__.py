"""Many runs for one question: which recipe is enough (compare), and which settings are best (sweep)."""
