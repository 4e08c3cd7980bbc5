"""Diagnosis of checkpoints before mixing: compatibility, barriers, geometry and loss landscapes."""
