"""Long runs whose figures are reported, never asserted in a test. Each is a ``make`` target."""
