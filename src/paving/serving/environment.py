"""Names of the environment variables by which a vLLM process is told what to serve. Nothing is imported here."""

CONTROLLER = "PAVING_CONTROLLER"
ALLOW_ORACLE = "PAVING_ALLOW_ORACLE"  # 1: requests may give their prompt's true bucket, and ask for the oracle
