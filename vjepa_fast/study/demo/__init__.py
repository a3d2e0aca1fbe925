"""The laptop demo: its plan, its task graph, its report."""
