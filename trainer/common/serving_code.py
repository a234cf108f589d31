"""What serving a model needs: our modules in its package, and the libraries."""

# The copies keep these paths: the same preprocessing serves and trains.
SERVING_CODE = tuple(
    f"{name}.py"
    for name in (
        "serving/__init__",
        "serving/backends",
        "serving/contract",
        "serving/decoders",
        "serving/engine",
        "serving/fetch",
        "serving/handler",
        "serving/manifest",
        "serving/package",
        "serving/s3",
        "serving/signature",
        "serving/work",
        "trainer/__init__",
        "trainer/common/__init__",
        "trainer/common/errors",
        "trainer/common/sessions",
        "trainer/common/temperature",
        "trainer/images/__init__",
        "trainer/images/apart",
        "trainer/images/bounds",
        "trainer/images/decode",
        "trainer/results/__init__",
        "trainer/results/calibrate",
        "trainer/results/prediction",
    )
)

# Their libraries, as in pyproject.toml; other ones or more if pictures were AVIF or HEIC.
REQUIREMENTS = {"numpy": "numpy>=1.26", "pillow": "pillow>=11", "onnxruntime": "onnxruntime>=1.19"}
FOR_AVIF = {"pillow": "pillow>=11.3"}
FOR_HEIC = {"pillow-heif": "pillow-heif>=1.1"}
