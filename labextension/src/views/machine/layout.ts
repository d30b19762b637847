/**
 * Where everything is in the machine picture: GPUs above, RAM below them, disks at the bottom, and the ways
 * between them. Weights that do not fit climb from there.
 */

import type { Translate } from '../../i18n'
import type { DeviceState, LinkState, MachineState } from '../../wire'
import { type Card, flatCard, storageCard, stripCard, uprightCard } from './cards'
import { unifiedGpus } from './facts'
import { heightOf, type Label } from './labels'
import { Links, pair } from './links'
import { isOwn, type Path } from './path'

export type Point = [number, number]
export interface Line {
  source: string
  target: string
  points: Point[]
}
/** A link, or all links of a kind where there are many: one thing to point at. */
export interface Way {
  key: string
  lines: Line[]
  links: LinkState[]
  label: Label
}
export interface Picture {
  /** Room at the left of 0, for ways that go past the RAM. */
  lane: number
  width: number
  height: number
  cards: Card[]
  ways: Way[]
}

/** A device above or below the RAM, and where its way leaves it. */
interface End {
  device: DeviceState
  x: number
  room: number
}

const GUTTER = 28
const ASIDE = 9
const GAP = 14
const WORDS_ASIDE = 14
const GPU_AT_LEAST = 176
const GPU_AT_MOST = 350
const CPU_AT_MOST = 580
const DISK_AT_MOST = 460
const SHARED_DIE_AT_LEAST = 170
const RAIL = 16
const LANE = 20
const OWN_WAYS_AT_MOST = 2

export function layout(state: MachineState, path: Path, width: number, t: Translate): Picture {
  const links = new Links(state, path, t)
  const ofKind = (kind: DeviceState['kind']) => state.devices.filter(device => device.kind === kind)
  const [disks, gpus] = [ofKind('disk'), ofKind('gpu')]
  const lane = links.from(disks, gpus).length || links.from(gpus, disks).length ? LANE : 0
  return new Layout(state, path, links, width - lane, lane).picture()
}

class Layout {
  private readonly cards: Card[] = []
  private readonly ways: Way[] = []
  private readonly gpus: DeviceState[]
  private readonly shared: DeviceState[]
  private readonly isGrid: boolean
  private y = 1

  constructor(
    private readonly state: MachineState,
    private readonly path: Path,
    private readonly links: Links,
    private readonly width: number,
    private readonly lane: number,
  ) {
    this.shared = unifiedGpus(state)
    this.gpus = state.devices.filter(device => device.kind === 'gpu' && !this.shared.includes(device))
    this.isGrid = this.gpus.length > OWN_WAYS_AT_MOST
  }

  picture(): Picture {
    this.placeNpus()
    const gpus = this.placeGpus()
    const ram = this.placeRam(gpus)
    this.placeDisks(ram, gpus)
    return { lane: this.lane, width: this.width, height: this.y + 1, cards: this.cards, ways: this.ways }
  }

  /** A line of its own above all, unless it is drawn at the memory that it shares. */
  private placeNpus(): void {
    for (const device of this.ofKind('npu')) {
      if (this.isInShared(device)) continue
      this.add(stripCard(device, this.centred(GPU_AT_MOST)))
      this.y += GAP
    }
  }

  /** Where there is room beside the processors that compute. */
  private isInShared(npu: DeviceState): boolean {
    const room = this.centred(CPU_AT_MOST).width / (this.shared.length + 1 + this.ofKind('npu').length)
    return this.shared.length > 0 && npu.unified && room >= SHARED_DIE_AT_LEAST
  }

  // --- GPUs

  private placeGpus(): Card[] {
    const fabric = this.links.from(this.gpus, this.gpus)
    if (!fabric.length) return this.gpuCards(false)
    const label = { ...this.links.fabricLabel(this.gpus, this.width - 20), x: this.width / 2, y: this.y }
    const rail = this.y + heightOf(label) + 8
    this.y = rail + RAIL
    const cards = this.gpuCards(true)
    this.ways.push({ key: 'fabric', links: fabric, label, lines: this.fabricLines(cards, fabric, rail) })
    return cards
  }

  private gpuCards(hasFabric: boolean): Card[] {
    return this.isGrid ? this.gpuGrid(hasFabric) : this.gpuRow(this.gpus, this.inRow(this.gpus.length, GPU_AT_MOST))
  }

  /** Rows of cards, with a gutter at the left of each for its bus and at its right for the GPUs' own links. */
  private gpuGrid(hasFabric: boolean): Card[] {
    const right = hasFabric ? GUTTER / 2 : 0
    const fitting = Math.max(1, Math.floor((this.width - right) / (GPU_AT_LEAST + GUTTER)))
    const rows = Math.ceil(this.gpus.length / fitting)
    const columns = Math.ceil(this.gpus.length / rows)
    const width = (this.width - right) / columns - GUTTER
    const cards: Card[] = []
    for (let first = 0; first < this.gpus.length; first += columns) {
      if (first) this.y += GAP
      cards.push(...this.gpuRow(this.gpus.slice(first, first + columns), { left: GUTTER, width, step: width + GUTTER }))
    }
    return cards
  }

  private gpuRow(gpus: DeviceState[], { left, width, step }: { left: number; width: number; step: number }): Card[] {
    const hasSteps = this.path.steps.some(one => isOwn(one) && this.gpus.some(gpu => gpu.id === one.target))
    const y = this.y
    return gpus.map((gpu, i) => this.add(uprightCard('gpu', [gpu], gpu, { x: left + i * step, y, width }, hasSteps)))
  }

  private fabricLines(cards: Card[], links: LinkState[], rail: number): Line[] {
    const lines: Line[] = []
    for (const [i, one] of cards.entries()) {
      for (const other of cards.slice(i + 1)) {
        const points = [...this.drop(one, rail), ...this.drop(other, rail).reverse()]
        lines.push({ source: idOf(one), target: idOf(other), points })
      }
    }
    return linesOf(lines, links)
  }

  /** From a GPU up to the rail of all GPUs. */
  private drop(card: Card, rail: number): Point[] {
    if (!this.isGrid) return [[card.x + card.width / 2, card.y], [card.x + card.width / 2, rail]]
    const [right, y] = [card.x + card.width, dieY(card)]
    return [[right, y], [right + ASIDE, y], [right + ASIDE, rail]]
  }

  // --- RAM and buses

  private placeRam(gpus: Card[]): Card | null {
    const [cpu, ...others] = this.ofKind('cpu')
    if (!cpu) return null
    // The buses end where the card will be; its height does not depend on them.
    const ramX = portOf(this.ramCard(cpu))
    if (this.isGrid) this.commonBus(cpu, gpus, ramX)
    else if (gpus.length) this.ownWays(cpu, gpus.map(card => this.endOf(card, gpus.length === 1 ? ramX : null)), ramX, true)
    const card = this.add(this.ramCard(cpu))
    for (const other of others) {
      this.y += GAP
      this.add(flatCard(other, this.centred(CPU_AT_MOST)))
    }
    return card
  }

  private ramCard(cpu: DeviceState): Card {
    const at = this.centred(CPU_AT_MOST)
    if (!this.shared.length) return flatCard(cpu, at)
    const dies = [...this.shared, cpu, ...this.ofKind('npu').filter(device => this.isInShared(device))]
    const hasSteps = this.path.steps.some(step => dies.some(device => device.id === step.target))
    return uprightCard('unified', dies, cpu, at, hasSteps)
  }

  /** Where the way of a card leaves it: near its left edge, so that its words have the card's width. */
  private endOf(card: Card, aloneX: number | null): End {
    const device = card.devices[0] as DeviceState
    const x = aloneX ?? card.x + 22
    return { device, x, room: (aloneX === null ? card.x + card.width : this.width) - x - WORDS_ASIDE }
  }

  /** A way with its own words for each device above or below the RAM; several meet before they reach it. */
  private ownWays(cpu: DeviceState, ends: End[], ramX: number, isAbove: boolean): void {
    const labels = ends.map(({ device, room }) => isAbove ? this.links.label(cpu, device, room) : this.links.label(device, cpu, room))
    const height = Math.max(...labels.map(heightOf)) + 22
    const branch = ends.length === 1 ? 0 : RAIL
    const [top, bottom] = [this.y, this.y + height + branch]
    const [far, near, rail] = isAbove ? [top, bottom, bottom - branch] : [bottom, top, top + branch]
    for (const [i, { device, x }] of ends.entries()) {
      const links = this.links.between(device, cpu)
      const points: Point[] = branch ? [[x, far], [x, rail], [ramX, rail], [ramX, near]] : [[x, far], [x, near]]
      const label = centredAt({ ...(labels[i] as Label), x: x + WORDS_ASIDE }, isAbove ? top : rail, height)
      if (links.length) this.ways.push({ key: `${device.id}-${cpu.id}`, links, label, lines: [{ source: device.id, target: cpu.id, points }] })
    }
    this.y = bottom
  }

  /** One bus with branches in the gutters, and words for all. */
  private commonBus(cpu: DeviceState, gpus: Card[], ramX: number): void {
    const links = [...this.links.from([cpu], this.gpus), ...this.links.from(this.gpus, [cpu])]
    const label = this.links.commonLabel(cpu, this.gpus, this.width - ramX - 20)
    const rail = this.y + RAIL
    const height = heightOf(label) + 18
    this.y = links.length ? rail + height : rail
    if (!links.length) return
    const lines = gpus.map(card => ({ source: cpu.id, target: idOf(card), points: [[ramX, this.y], ...branch(card, ramX, rail)] as Point[] }))
    this.ways.push({ key: 'bus', links, lines: linesOf(lines, links), label: centredAt({ ...label, x: ramX + WORDS_ASIDE }, rail, height) })
  }

  // --- Disks

  private placeDisks(ram: Card | null, gpus: Card[]): void {
    const disks = this.ofKind('disk')
    if (!disks.length) return
    const row = this.inRow(disks.length, disks.length === 1 ? DISK_AT_MOST : GPU_AT_MOST)
    // A single disk stands under its RAM.
    const left = ram && disks.length === 1 ? ram.x : row.left
    const place = () => disks.map((disk, i) => storageCard(disk, { x: left + i * row.step, y: this.y, width: row.width }))
    const cpu = ram?.memory?.device
    if (ram && cpu) this.ownWays(cpu, place().map(card => this.endOf(card, disks.length === 1 ? portOf(ram) : null)), portOf(ram), false)
    else this.y += GAP
    const cards = place()
    for (const card of cards) this.add(card)
    for (const card of cards) this.placeBypass(card, gpus)
  }

  /** Ways from a disk right to GPUs, past the RAM: up the lane, to the cards that stand at it. */
  private placeBypass(disk: Card, gpus: Card[]): void {
    const device = disk.devices[0] as DeviceState
    const linked = gpus.filter(card => this.links.between(device, card.devices[0] as DeviceState).length)
    if (!linked.length) return
    const devices = linked.flatMap(card => card.devices)
    const links = [...this.links.from([device], devices), ...this.links.from(devices, [device])]
    const label = { ...this.links.commonLabel(device, devices, this.width), y: this.y + 4 }
    // Another column cannot be reached from the lane without crossing a card: the first one shows the way.
    const edge = Math.min(...linked.map(card => card.x))
    const lines = linked.map(card => ({ source: device.id, target: idOf(card), points: pastRam(disk, card, edge) }))
    this.ways.push({ key: `${device.id}-gpus`, links, lines, label })
    this.y += heightOf(label) + 8
  }

  // --- Places

  private ofKind(kind: DeviceState['kind']): DeviceState[] {
    return this.state.devices.filter(device => device.kind === kind)
  }

  private add(card: Card): Card {
    this.cards.push(card)
    this.y = Math.max(this.y, card.y + card.height)
    return card
  }

  private centred(most: number): { x: number; y: number; width: number } {
    const width = Math.min(most, this.width)
    return { x: (this.width - width) / 2, y: this.y, width }
  }

  private inRow(count: number, most: number): { left: number; width: number; step: number } {
    const gaps = GAP * Math.max(0, count - 1)
    const width = Math.min(most, (this.width - gaps) / Math.max(1, count))
    return { left: (this.width - count * width - gaps) / 2, width, step: width + GAP }
  }
}

function idOf(card: Card): string {
  return card.devices[0]?.id ?? ''
}

function linesOf(lines: Line[], links: LinkState[]): Line[] {
  const linked = new Set(links.map(pair))
  return lines.filter(line => linked.has(pair(line)))
}

/** From the end of the trunk to a GPU, through the gutter at its left. */
function branch(card: Card, ramX: number, rail: number): Point[] {
  const x = card.x - ASIDE
  const y = card.memory ? card.memory.y + card.memory.height / 2 : card.y + card.height / 2
  return [[ramX, rail], [x, rail], [x, y], [card.x, y]]
}

function pastRam(disk: Card, gpu: Card, edge: number): Point[] {
  const [x, low, high] = [-LANE / 2, disk.y + disk.height - 16, (gpu.memory?.y ?? gpu.y) + 12]
  return [[disk.x, low], [x, low], [x, high], [edge, high]]
}

/** Where ways reach the RAM: left of the middle of its bar, so that their words have room. */
function portOf(card: Card): number {
  if (card.kind === 'unified' || !card.memory) return card.x + card.width * 0.25
  return card.memory.x + card.memory.width * 0.4
}

function dieY(card: Card): number {
  return card.dies[0] ? card.dies[0].y + card.dies[0].height / 2 : card.y + 20
}

function centredAt(label: Label, top: number, height: number): Label {
  return { ...label, y: top + (height - heightOf(label)) / 2 }
}
