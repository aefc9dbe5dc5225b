"""One call, one loop: score, select, remove, repair, measure."""
