"""What units cost, in operations, parameters and time, and which to remove for a budget."""
