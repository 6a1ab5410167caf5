"""The examples in the help of the subcommands of ``partition-viz`` that take plans."""

CODES = "exit codes: 0 done, 2 wrong arguments or a bad plan, 3 the model cannot be captured, 4 no plan fits\n"

SHOW = f"""examples:
  partition-viz show demo:resnet --devices 4
  partition-viz show plan.json
  partition-viz show hf:bert --cluster sim:8xH100-80GB --replicas 2
  partition-viz show train.py:build --devices cpu,cpu --schedule 1f1b --json > plan.json

{CODES}"""

SCHEMA = """examples:
  partition-viz schema > plan.schema.json
  partition-viz schema | python -m json.tool --compact

exit codes: 0 done, 2 wrong arguments
"""

CHECK = """examples:
  partition-viz check plan.json
  partition-viz check plan.json --fail-on 'bubble>0.25,imbalance>1.15'
  partition-viz check train.py:build --cluster sim:4xA100-80GB --fail-on 'step>200ms,filled>90%,speedup<3' --json

exit codes: 0 no condition holds, 1 one does, 2 wrong arguments or a bad plan, 3 the model cannot be captured,
4 no plan fits
"""

REPORT = """examples:
  partition-viz report plan.json -o plan.html
  partition-viz report torchvision:resnet50 --cluster sim:4xA100-80GB -o resnet50.html
  partition-viz report run.json -o run.html                   (measured under predicted)
  partition-viz report timm:resnet18 --devices 2 -o plan.png  (pip install "stagecut[png]")
  partition-viz report before.json after.json -o both.html    (beside each other)

the page is one file that loads nothing: attach it to an issue, open it from disk

exit codes: 0 done, 2 wrong arguments or a bad plan, 3 the model cannot be captured, 4 no plan fits
"""

COMPARE = """examples:
  partition-viz compare before.json after.json
  partition-viz compare plans/*.json --json

exit codes: 0 done, 2 wrong arguments or a bad plan
"""

PROFILE = """examples:
  partition-viz profile demo:mlp --devices cpu,cpu -o run.json
  partition-viz profile demo:gpt --devices 2 --stages 2 --schedule 1f1b --steps 20 -o run.json --json
  partition-viz profile demo:mlp --plan plan.json -o run.json
  partition-viz show run.json
  partition-viz report run.json -o run.html

the run that is written has the plan, what every worker did in the median step, and the seconds of every step; show,
report, export, check and compare take it in place of a plan; without --plan the model is planned by prediction alone,
with ops timed on this machine

exit codes: 0 done, 2 wrong arguments, devices that are not here, or a step that fails, 3 the model cannot be captured,
4 no plan fits
"""

EXPORT = f"""examples:
  partition-viz export plan.json -o plan.dot          (Graphviz: every op, in stages)
  partition-viz export plan.json -o plan.mmd          (Mermaid: the stages and what crosses)
  partition-viz export plan.json -o plan.graphml      (networkx, Gephi, yEd: ops with their costs)
  partition-viz export plan.json -o ops.csv           (a row for each op)
  partition-viz export run.json -o run.trace.json     (Perfetto: the predicted step, and the measured one)
  partition-viz export plan.json -o plan.png          (pip install "stagecut[png]")
  partition-viz export demo:unet --devices 2 -o plan.json

of a measured run, .json is its plan alone

{CODES}"""

SWEEP = """examples:
  partition-viz sweep demo:resnet --devices 4 --stages 2,4 --microbatches 4,8,16
  partition-viz sweep torchvision:resnet50 --cluster sim:4xA100-80GB --schedule 1f1b,zb-h1 --recompute no,yes --json

every combination is planned; "best" has no other one with a shorter step and as little memory

exit codes: 0 done, 2 wrong arguments, 3 the model cannot be captured, 4 no combination has a plan
"""
