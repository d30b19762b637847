/** Blocks in other homes, before Python has said what that means: they jump at once, numbers follow. */

import type { BlockState, PlanState, TierState } from '../../wire'
import { computesOnGpu, homeBytes } from '../map/facts'

/** These blocks and all that share tensors with them, which can only live in one place. */
export function withTied(plan: PlanState, labels: Iterable<string>): Set<string> {
  const found = new Set(labels)
  const partners = tiedLabels(plan)
  const todo = [...found]
  for (let label = todo.pop(); label !== undefined; label = todo.pop()) {
    for (const partner of partners.get(label) ?? []) {
      if (!found.has(partner)) todo.push(partner)
      found.add(partner)
    }
  }
  return found
}

/** Label → labels that it is tied to, whichever of the two says so. */
function tiedLabels(plan: PlanState): Map<string, Set<string>> {
  const partners = new Map(plan.blocks.map(block => [block.label, new Set<string>()]))
  for (const block of plan.blocks) {
    for (const other of block.tied_to) {
      partners.get(block.label)?.add(other)
      partners.get(other)?.add(block.label)
    }
  }
  for (const others of partners.values()) {
    for (const other of others) if (!partners.has(other)) others.delete(other)
  }
  return partners
}

/** The plan as it will look about, with these blocks on a device. */
export function guess(plan: PlanState, labels: Set<string>, device: string): PlanState {
  const main = plan.blocks.find(block => block.compute !== 'cpu')?.compute ?? ''
  const isOnGpu = computesOnGpu(plan)
  const moving = plan.blocks.filter(block => labels.has(block.label) && block.home !== device)
  const move = (block: BlockState): BlockState =>
    !moving.includes(block) ? block
    : block.way === 'idle' ? { ...block, home: device }
    : { ...block, home: device, rest_bytes: 0, ...wayTo(plan, block, device, isOnGpu ? main : 'cpu') }
  return {
    ...plan,
    policy: '',
    blocks: plan.blocks.map(move),
    tiers: plan.tiers.map(tier => shifted(tier, change(tier, moving, device))),
  }
}

function wayTo(plan: PlanState, block: BlockState, device: string, compute: string): Pick<BlockState, 'way' | 'compute'> {
  const kind = plan.tiers.find(tier => tier.device === device)?.kind
  if (kind !== 'cpu' && kind !== 'disk') return { way: 'resident', compute: device }
  if (kind === 'cpu' && compute === 'cpu') return { way: 'cpu', compute }
  if (block.looks_up) return { way: 'looked-up', compute }
  return { way: kind === 'disk' ? 'read' : 'streamed', compute }
}

/** Bytes that come to a tier, less those that go. */
function change(tier: TierState, moving: BlockState[], device: string): number {
  return moving.reduce((sum, block) => {
    const comes = tier.device === device ? block.bytes : 0
    const goes = tier.device === block.home ? homeBytes(block) : 0
    const rest = tier.device === block.compute ? block.rest_bytes : 0
    return sum + comes - goes - rest
  }, 0)
}

function shifted(tier: TierState, bytes: number): TierState {
  if (!bytes) return tier
  return {
    ...tier, weights: tier.weights + bytes, planned: tier.planned + bytes, spare: tier.spare - bytes,
  }
}
