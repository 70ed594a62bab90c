"""What each method costs on a problem, and which one to take."""
