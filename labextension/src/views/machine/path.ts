/**
 * The path of one token: which bytes go over which link, in which order, and which of the ways is the slowest.
 *
 * A move from the disk to a GPU goes through RAM where no link does it at once; then its bytes load both links,
 * which is why steps are counted by link and not by move.
 */

import type { LinkState, MachineState, MoveState } from '../../wire'

/** Bytes of one token over one link; `source` is `target` where a processor reads its own memory. */
export interface Step {
  number: number
  source: string
  target: string
  bytes: number
  /** 0 when the speed is unknown. */
  seconds: number
}

export interface Path {
  steps: Step[]
  moved: number
  read: number
  /** Seconds of a token when all ways work at the same time; 0 when a speed is unknown. */
  seconds: number
  /** What sets the pace: the slowest link, or all reads of memory, which come one after the other. */
  limiting: Step[]
}

interface Hop {
  source: string
  target: string
  bytesPerS: number
}

export function pathOf(state: MachineState): Path {
  const loads = new Map<string, Hop & { bytes: number }>()
  for (const move of state.moves) {
    for (const hop of hopsOf(move, state)) {
      const key = `${hop.source}→${hop.target}`
      const load = loads.get(key) ?? { ...hop, bytes: 0 }
      loads.set(key, { ...load, bytes: load.bytes + move.bytes, bytesPerS: Math.max(load.bytesPerS, hop.bytesPerS) })
    }
  }
  const ordered = [...loads.values()].sort((one, other) => rank(one, state) - rank(other, state))
  return summed(ordered.map((load, i) => step(load, i + 1)))
}

function step({ source, target, bytes, bytesPerS }: Hop & { bytes: number }, number: number): Step {
  return { number, source, target, bytes, seconds: bytesPerS ? bytes / bytesPerS : 0 }
}

function summed(steps: Step[]): Path {
  const own = steps.filter(isOwn)
  const hops = steps.filter(one => !isOwn(one))
  const sum = (some: Step[], of: 'bytes' | 'seconds') => some.reduce((total, one) => total + one[of], 0)
  const isKnown = steps.every(one => one.seconds > 0)
  // Layers compute one after the other, on whatever device; copies go on behind them.
  const seconds = isKnown ? Math.max(0, sum(own, 'seconds'), ...hops.map(hop => hop.seconds)) : 0
  const slow = hops.find(hop => hop.seconds === seconds)
  const limiting = !seconds ? [] : slow ? [slow] : own
  return { steps, moved: sum(hops, 'bytes'), read: sum(own, 'bytes'), seconds, limiting }
}

export function isOwn(step: Pick<Step, 'source' | 'target'>): boolean {
  return step.source === step.target
}

function hopsOf(move: MoveState, state: MachineState): Hop[] {
  if (move.source === move.target) return [{ ...move, bytesPerS: move.bytes_per_s }]
  const links = route(move.source, move.target, state.links)
  if (links) return links.map(link => ({ ...link, bytesPerS: link.bytes_per_s || (links.length === 1 ? move.bytes_per_s : 0) }))
  const isUnified = state.devices.some(device => device.id === move.target && device.unified)
  const toRam = isUnified && move.source !== 'cpu' ? route(move.source, 'cpu', state.links) : null
  // One memory: what came from the disk is where the GPU reads it.
  if (toRam) return toRam.map(link => ({ ...link, bytesPerS: link.bytes_per_s }))
  return [{ ...move, bytesPerS: move.bytes_per_s }]
}

/** The way of the fewest links, and of the fastest among these. */
function route(source: string, target: string, links: LinkState[]): LinkState[] | null {
  const fastest = [...links].sort((one, other) => other.bytes_per_s - one.bytes_per_s)
  const seen = new Set([source])
  let fringe: { at: string; way: LinkState[] }[] = [{ at: source, way: [] }]
  while (fringe.length) {
    const next: typeof fringe = []
    for (const { at, way } of fringe) {
      for (const link of fastest) {
        if (link.source !== at || seen.has(link.target)) continue
        if (link.target === target) return [...way, link]
        seen.add(link.target)
        next.push({ at: link.target, way: [...way, link] })
      }
    }
    fringe = next
  }
  return null
}

/** Bytes climb: from the disk, over the buses, into the processors, and between these. */
function rank(hop: Hop, state: MachineState): number {
  const kind = (id: string) => state.devices.find(device => device.id === id)?.kind
  if (kind(hop.source) === 'disk') return 0
  if (hop.source === hop.target) return kind(hop.source) === 'gpu' ? 2 : 3
  return kind(hop.source) === 'cpu' ? 1 : 4
}
