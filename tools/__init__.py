"""What looks at plans: the ``partition-viz`` command and the pictures and pages that it draws."""
