"""The laptop demo and its report."""
