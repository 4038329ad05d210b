"""Where real data come from: one file a source."""
