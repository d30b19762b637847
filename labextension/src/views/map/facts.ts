/**
 * What the memory map draws, as numbers and signs: no elements, no words of a language.
 *
 * The same geometry as `llm_magic/views/map.py`: all bars at one scale, bytes as shares of a bar.
 */

import type { Fill } from '../../theme'
import type { BlockState, MapState, PlanState, TierState } from '../../wire'

/** What else is in a tier than blocks of weights, in the order it is drawn. */
export const PURPOSES = ['split', 'kept', 'draft', 'slots', 'kv_cache', 'activations', 'buffers'] as const
export type Purpose = (typeof PURPOSES)[number] | 'spare' | 'beyond' | 'reserve' | 'other'
export interface Part {
  purpose: Purpose
  bytes: number
}

const FILL_OF_WAY: Record<string, Fill> = {
  resident: 'gpu',
  'looked-up': 'looked-up',
  streamed: 'ram-streamed',
  split: 'ram',
  cpu: 'ram',
  kept: 'kept',
  read: 'disk',
  idle: 'idle',
}
/** Fastest first: the order of shares and legends. */
export const BLOCK_FILLS = ['gpu', 'looked-up', 'ram-streamed', 'ram', 'kept', 'disk', 'idle'] as const

/** The colour and pattern of a block; a way that this view does not know yet is grey. */
export function fillOfBlock(block: BlockState): Fill {
  return FILL_OF_WAY[block.way] ?? 'buffers'
}

/** Bytes of a block that are where it lives: of a split one the experts. */
export function homeBytes(block: BlockState): number {
  return block.bytes - block.rest_bytes
}

export function fillOfPart(purpose: Purpose): Fill {
  return purpose === 'spare' || purpose === 'beyond' ? 'free' : purpose
}

/** Whether a GPU works beside the CPU, or alone. */
export function computesOnGpu(plan: PlanState): boolean {
  return plan.blocks.some(block => block.compute !== 'cpu')
}

/**
 * One sign for what happens to a block: the GPU's number, `L` (looked up), `S` (split), `R`, `C` (by the CPU), `D`,
 * `K` (kept), `–` for nothing.
 */
export function signOf(plan: PlanState, block: BlockState): string {
  if (block.way === 'idle') return '–'
  if (block.way === 'looked-up') return 'L'
  if (block.way === 'split') return 'S'
  if (block.home === 'disk') return block.way === 'kept' ? 'K' : 'D'
  if (block.home === 'cpu') return block.way === 'cpu' && computesOnGpu(plan) ? 'C' : 'R'
  const processors = plan.tiers.filter(tier => tier.kind !== 'cpu' && tier.kind !== 'disk')
  const index = processors.findIndex(tier => tier.device === block.home)
  if (index < 0) return '?'
  return index < 10 ? String(index) : String.fromCharCode('a'.charCodeAt(0) + index - 10)
}

/** `"19"` of `"layers.19"`; other labels as they are. */
export function shortLabel(label: string): string {
  return label.slice(label.lastIndexOf('.') + 1)
}

/** The number under a block of the strip: every tenth layer has one. */
export function tickOf(block: BlockState): string {
  const index = shortLabel(block.label)
  return index !== block.label && /^\d+$/.test(index) && Number(index) % 10 === 0 ? index : ''
}

/** Tiers to draw, fastest first: GPUs, what is used, and what blocks may be moved to. */
export function shownTiers(plan: PlanState, isEditable: boolean): TierState[] {
  return plan.tiers.filter(tier => tier.planned || tier.kind === 'gpu' || (isEditable && tier.can_hold))
}

/** Blocks that a tier's bar shows, in model order. What shares all its bytes with another has none. */
export function blocksIn(plan: PlanState, device: string): BlockState[] {
  return plan.blocks.filter(block => block.home === device && block.bytes > 0)
}

/** All that is drawn after the blocks; a bar that is cut off ends with what is planned. */
export function partsOf(tier: TierState): Part[] {
  const parts: Part[] = PURPOSES.map(purpose => ({ purpose, bytes: tier[purpose] }))
  if (tier.is_whole) {
    const room = Math.max(0, tier.total - tier.planned - tier.reserve - tier.other)
    const spare = Math.min(room, Math.max(0, tier.spare))
    parts.push({ purpose: 'spare', bytes: spare }, { purpose: 'beyond', bytes: room - spare })
    parts.push({ purpose: 'reserve', bytes: tier.reserve }, { purpose: 'other', bytes: tier.other })
  }
  return parts.filter(part => part.bytes > 0)
}

/** What the width of a tier's bar stands for. */
export function shownBytes(tier: TierState): number {
  return tier.is_whole ? Math.max(tier.total, tier.planned + tier.reserve + tier.other) : tier.planned
}

/** What the whole width of the picture stands for: one scale for all tiers. */
export function scaleOf(tiers: TierState[]): number {
  return Math.max(1, ...tiers.map(shownBytes))
}

/** `share(1, 8)` is `"12.500%"`. */
export function share(bytes: number, whole: number): string {
  return `${whole > 0 ? Math.min(100, (100 * bytes) / whole).toFixed(3) : '0.000'}%`
}

/** Where a tier that is asked for too much ends, or its budget does; null where there is room. */
export function endOf(tier: TierState): { bytes: number; isLimit: boolean } | null {
  if (tier.is_whole && shownBytes(tier) > tier.total) return { bytes: tier.total, isLimit: false }
  if (tier.spare < 0 && tier.limit < tier.planned) return { bytes: tier.limit, isLimit: true }
  return null
}

/** Bytes between two marks of the scale: a power of two, so that there are four to eight of them. */
export function stepOf(scale: number): number {
  return 2 ** Math.max(0, Math.ceil(Math.log2(scale / 8)))
}

/** What leaves a tier for every token. */
export interface Traffic {
  bytes: number
  targets: string[]
  bytesPerS: number
}

export function trafficFrom(plan: PlanState, device: string): Traffic | null {
  const moves = plan.moves.filter(move => move.source === device && move.target !== device && move.bytes > 0)
  if (!moves.length) return null
  return {
    bytes: moves.reduce((sum, move) => sum + move.bytes, 0),
    targets: [...new Set(moves.map(move => move.target))],
    bytesPerS: Math.max(...moves.map(move => move.bytes_per_s)),
  }
}

const STRIP_CELLS = 66

/** Blocks in a row of the strip: rows of equal length. */
export function stripColumns(count: number, atMost = STRIP_CELLS): number {
  return Math.max(1, Math.ceil(count / Math.max(1, Math.ceil(count / atMost))))
}

/** What happens to the weights that are used (a fill) → whole percents that add up to 100. */
export function weightShares(plan: PlanState): Map<Fill, number> {
  const sizes = new Map<Fill, number>()
  for (const fill of BLOCK_FILLS) sizes.set(fill, 0)
  for (const block of plan.blocks) {
    if (block.way === 'idle') continue
    const fill = fillOfBlock(block)
    sizes.set(fill, (sizes.get(fill) ?? 0) + homeBytes(block))
    sizes.set('gpu', (sizes.get('gpu') ?? 0) + block.rest_bytes)
  }
  return percents(new Map([...sizes].filter(([, bytes]) => bytes > 0)))
}

/** Whole percents by largest remainder; what is there shows at least 1 %. */
export function percents<K>(sizes: Map<K, number>): Map<K, number> {
  const total = [...sizes.values()].reduce((sum, size) => sum + size, 0)
  if (!total) return new Map()
  const exact = [...sizes].map(([key, size]) => ({ key, percent: (100 * size) / total, left: 0 }))
  const whole = new Map(exact.map(({ key, percent }) => [key, Math.max(1, Math.floor(percent))]))
  const sum = () => [...whole.values()].reduce((all, percent) => all + percent, 0)
  const byRemainder = [...exact].sort((a, b) => (b.percent % 1) - (a.percent % 1))
  for (const { key } of byRemainder) if (sum() < 100) whole.set(key, (whole.get(key) ?? 0) + 1)
  const largest = exact.reduce((most, one) => (one.percent > most.percent ? one : most))
  whole.set(largest.key, (whole.get(largest.key) ?? 0) + 100 - sum())
  return whole
}

/** Of the tiers that compute, the one with the least room. */
export function tightestTier(plan: PlanState): TierState | null {
  const computing = new Set(plan.blocks.map(block => block.compute))
  const tiers = plan.tiers.filter(tier => computing.has(tier.device))
  return tiers.length ? tiers.reduce((least, tier) => (tier.spare < least.spare ? tier : least)) : null
}

export function sumOf(sizes: Record<string, number>): number {
  return Object.values(sizes).reduce((sum, size) => sum + size, 0)
}

/** Whether the same placement is in force in both: homes and ways of all blocks, and the budgets that were set. */
export function isSamePlacement(a: MapState, b: MapState): boolean {
  return a === b || (a.status === b.status && a.model === b.model && placementKey(a.plan) === placementKey(b.plan))
}

function placementKey({ blocks, tiers }: PlanState): string {
  const limits = tiers.map(tier => [tier.device, tier.is_limited && tier.limit])
  return JSON.stringify([blocks.map(({ label, home, compute, way }) => [label, home, compute, way]), limits])
}

/** Whether blocks of this map may be moved: the model is here, or can be loaded. */
export function isEditable(state: MapState): boolean {
  return (state.status === 'loaded' || state.status === 'planned') && state.plan.blocks.length > 0
}
