"""Which of our modules answer for a model: those that travel in its package and Lambda's zip."""

# The copies keep these paths, so the code that serves a picture is the code that prepared it.
SERVING_CODE = tuple(
    f"{name}.py"
    for name in (
        "serving/__init__",
        "serving/backends",
        "serving/engine",
        "serving/fetch",
        "serving/handler",
        "serving/package",
        "serving/s3",
        "trainer/__init__",
        "trainer/common/__init__",
        "trainer/common/errors",
        "trainer/images/__init__",
        "trainer/images/apart",
        "trainer/images/bounds",
        "trainer/images/decode",
        "trainer/results/__init__",
        "trainer/results/calibrate",
    )
)
