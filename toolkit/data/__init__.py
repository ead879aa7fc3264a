"""From files, named sets and hub ids to exact rows, labels, splits and token tables."""
