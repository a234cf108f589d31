"""The verbs of `python -m launch`, and what each does, in a line. Standard library only."""

# launch.verbs.VERB has the verb's main(arguments) -> exit code; it is imported when asked for.
VERBS = {
    "up": "make or change the account's foundation: bucket and roles; shows the changes and asks",
    "plan": "show what submit will send, what it costs, what it may touch and what is missing",
    "submit": "upload the code, and --data DIR where it isn't there, and start the job; "
    "--wait follows it to its end",
    "export": "write the same run for SkyPilot, dstack or AWS Batch, which supervise it without a "
    "laptop: --to NAME",
    "status": "list the runs, and everything that costs money now; "
    "--end ends what is past its limit",
    "runs": "the runs so far, here and in the bucket; --compare RUN RUN: which is better",
    "logs": "show what a run prints; --follow until it ends",
    "connect": "open a shell on a machine (target=box is one for that), "
    "or show the address of the notebook",
    "stop": "stop a run after a checkpoint",
    "fetch": "bring a run's model package, report and metrics to this machine, verified",
    "cost": "dollars spent, dollars lost to work done twice, dollars per point of accuracy",
    "rehearse": "run a SageMaker job on this machine, with AWS's own toolkit",
    "prices": "the prices that plans use; --refresh asks AWS",
    "instances": "the machines for this job, what an epoch costs on each, "
    "and why the default is the default",
    "policy": "print the policy of a part, with the reason for each statement",
    "audit": "look for what is dangerous or wasteful in the account's ML resources",
    "delete": "delete the notebook, with its disk; asks first",
    "down": "stop everything of this project, empty the bucket and delete all; lists it and asks",
}
