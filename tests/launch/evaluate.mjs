// Decides requests by IAM policies, with @cloud-copilot/iam-simulate: node evaluate.mjs PACKAGE, and a line for each lot of them on the standard input:
// {"account": ..., "policies": {NAME: POLICY}, "asks": [ASK, ...]}
// ASK: {"policy": NAME, "action": ..., "resource": ..., "context": {...}}. Answers each line by a list, in the order of asks: true, false, or a text where the
// evaluator refuses the question (a resource or context key that the action does not have).
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { createInterface } from 'node:readline'
import { pathToFileURL } from 'node:url'

const packageJson = createRequire(import.meta.url).resolve(`${process.argv[2]}/package.json`)
const entry = JSON.parse(readFileSync(packageJson)).exports['.'].import
const { runSimulation } = await import(pathToFileURL(`${process.argv[2]}/${entry}`))

const everything = { Version: '2012-10-17', Statement: [{ Effect: 'Allow', Action: '*', Resource: '*' }] }

async function decide({ policies, asks, account }) {
  // Keys and roles have policies of their own, which decide too: here they leave it to the account, as the usual ones do.
  const root = { Effect: 'Allow', Principal: { AWS: `arn:aws:iam::${account}:root` } }
  const own = {
    sts: { Version: '2012-10-17', Statement: [{ ...root, Action: 'sts:AssumeRole' }] },
    kms: { Version: '2012-10-17', Statement: [{ ...root, Action: 'kms:*', Resource: '*' }] },
  }
  const answers = []
  for (const ask of asks) {
    const answer = await runSimulation({
      request: {
        principal: `arn:aws:iam::${account}:role/asking`,
        action: ask.action,
        // Our side of the decision: what AWS's own accounts (images, public parameters) let everyone read is theirs.
        resource: { resource: ask.resource, accountId: account },
        contextVariables: ask.context,
      },
      identityPolicies: [{ name: ask.policy, policy: policies[ask.policy] }],
      serviceControlPolicies: [{ orgIdentifier: 'root', policies: [{ name: 'all', policy: everything }] }],
      resourceControlPolicies: [],
      resourcePolicy: own[ask.action.split(':')[0]],
    }, {})
    if (answer.resultType === 'error') answers.push(`${answer.errors.message} ${JSON.stringify(answer.errors)}`)
    else if (answer.result?.ignoredContextKeys?.length) answers.push(`no such context: ${answer.result.ignoredContextKeys}`)
    else answers.push(answer.overallResult === 'Allowed')
  }
  return answers
}

for await (const line of createInterface({ input: process.stdin })) console.log(JSON.stringify(await decide(JSON.parse(line))))
