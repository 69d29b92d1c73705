"""What runs say together: comparisons and pages."""
