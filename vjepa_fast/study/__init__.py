"""The study of the published objectives, the laptop demo, and their reports."""
