/**
 * Cards of the machine picture: processors above (or beside) the memory that they read.
 *
 * Only sizes and places are here, in pixels of the picture, so that they can be tested without a page.
 */

import type { DeviceState } from '../../wire'

export interface Rect {
  x: number
  y: number
  width: number
  height: number
}
export interface Place extends Rect {
  device: DeviceState
}
/** The way from a memory into a processor on the same card. */
export interface Inner {
  device: DeviceState
  from: [number, number]
  to: [number, number]
  isUpright: boolean
  /** Where its words begin (upright) or have their middle (flat), and how long they may be. */
  words: { x: number; y: number; room: number }
}
export interface Card extends Rect {
  kind: 'cpu' | 'disk' | 'gpu' | 'npu' | 'unified'
  /** Whose card it is; the title says it. */
  devices: DeviceState[]
  dies: Place[]
  inners: Inner[]
  memory: Place | null
}

export const PAD = 12
const TITLE = 43
const FLAT_TITLE = 28
const DIE = 34
const MEMORY = 60
const STRIP = 34
const INNER = 30
const INNER_WITH_STEP = 48
const GAP = 10

/** A GPU, or all that share one memory: processors in a row above it. */
export function uprightCard(kind: Card['kind'], dies: DeviceState[], memory: DeviceState, at: Omit<Rect, 'height'>, hasSteps: boolean): Card {
  const inner = hasSteps ? INNER_WITH_STEP : INNER
  const width = (at.width - 2 * PAD - GAP * (dies.length - 1)) / dies.length
  const top = at.y + TITLE
  const placed = dies.map((device, i) => ({ device, x: at.x + PAD + i * (width + GAP), y: top, width, height: DIE }))
  const below = top + DIE + inner
  return {
    ...at, kind, devices: dies, dies: placed, height: TITLE + DIE + inner + MEMORY + PAD,
    memory: { device: memory, x: at.x + PAD, y: below, width: at.width - 2 * PAD, height: MEMORY },
    inners: placed.filter(reads).map(die => upright(die, below)),
  }
}

/** The CPU beside its RAM: buses come to the RAM from above and below. */
export function flatCard(device: DeviceState, at: Omit<Rect, 'height'>): Card {
  const inside = at.width - 2 * PAD
  const die = Math.min(150, Math.max(108, inside * 0.24))
  const gap = Math.min(120, Math.max(82, inside * 0.2))
  const y = at.y + FLAT_TITLE
  const memory = { device, x: at.x + PAD, y, width: inside - die - gap, height: MEMORY }
  const place = { device, x: at.x + PAD + inside - die, y, width: die, height: MEMORY }
  const middle = y + MEMORY / 2
  const inner: Inner = {
    device, from: [memory.x + memory.width, middle], to: [place.x, middle], isUpright: false,
    words: { x: place.x - gap / 2, y: middle, room: gap - 6 },
  }
  return { ...at, kind: 'cpu', devices: [device], dies: [place], memory, inners: reads(place) ? [inner] : [], height: FLAT_TITLE + MEMORY + PAD }
}

/** A disk. */
export function storageCard(device: DeviceState, at: Omit<Rect, 'height'>): Card {
  const memory = { device, x: at.x + PAD, y: at.y + FLAT_TITLE, width: at.width - 2 * PAD, height: MEMORY }
  return { ...at, kind: 'disk', devices: [device], dies: [], inners: [], memory, height: FLAT_TITLE + MEMORY + PAD }
}

/** A processor that nobody uses: its name. */
export function stripCard(device: DeviceState, at: Omit<Rect, 'height'>): Card {
  return { ...at, kind: 'npu', devices: [device], dies: [], inners: [], memory: null, height: STRIP }
}

function reads(place: Place): boolean {
  return place.device.read_bytes_per_s > 0
}

function upright(die: Place, memoryTop: number): Inner {
  const x = die.x + 12
  const top = die.y + die.height
  return {
    device: die.device, from: [x, memoryTop], to: [x, top], isUpright: true,
    words: { x: x + 13, y: (top + memoryTop) / 2, room: die.width - 25 },
  }
}
