"""Why a run's numbers are what they are: routing or editing, direction of the edit, where the classes separate."""
