/** The tiers as bars at one scale, with what moves between them for every token. */

import { h, replace, setText } from '../../dom'
import type { Translate } from '../../i18n'
import { formatBytes } from '../../units'
import type { BlockState, PlanState, TierState } from '../../wire'
import { type Scene, setAttribute, setClass } from './cells'
import {
  blocksIn, endOf, fillOfPart, homeBytes, type Part, partsOf, scaleOf, share, shortLabel, shownBytes, shownTiers, stepOf, trafficFrom,
} from './facts'
import { BlockList } from './list'
import {
  deviceTitle, heldWords, leftWords, onDevice, partsWords, partWords, purposeWords, tierName, tierSize, trafficWords,
} from './words'

const PIXELS = 600 // of the widest bar, where nothing is laid out yet
const PIXELS_OF_SIGN = 6.5
const PIXELS_OF_TURNED_SIGN = 8.5

/** One tier: its list of blocks, and a place below its bar for a budget. */
export interface TierRow {
  device: string
  element: HTMLElement
  list: BlockList
  slot: HTMLElement
  show: (scene: Scene, tier: TierState, scale: number, pixels: number) => void
  showNow: (scene: Scene, tier: TierState) => void
}

export class Tiers {
  readonly element = h('div', { class: 'tiers' })
  rows: TierRow[] = []
  private pixels = PIXELS
  private readonly scaleRow: HTMLElement
  private readonly track = h('div', { class: 'track' })

  constructor(private readonly t: Translate) {
    const field = h('div', { class: 'field' }, this.track)
    this.scaleRow = h('div', { class: 'row scale-row', 'aria-hidden': 'true' }, h('div'), field, h('div'))
  }

  get lists(): BlockList[] {
    return this.rows.map(row => row.list)
  }

  show(scene: Scene, isEditable: boolean): void {
    const tiers = shownTiers(scene.plan, isEditable)
    this.arrange(tiers)
    const scale = scaleOf(tiers)
    const { pixels } = this
    tiers.forEach((tier, i) => this.rows[i]?.show(scene, tier, scale, pixels))
    this.showScale(scale, pixels)
  }

  /** Only what the loaded model uses now. */
  showNow(scene: Scene): void {
    for (const row of this.rows) {
      const tier = scene.plan.tiers.find(one => one.device === row.device)
      if (tier) row.showNow(scene, tier)
    }
  }

  /** Look how wide bars can be; a layout is dear, so only when the width is another. */
  measure(): void {
    this.pixels = this.track.clientWidth || PIXELS
  }

  private arrange(tiers: TierState[]): void {
    const isSame = tiers.length === this.rows.length && tiers.every((tier, i) => tier.device === this.rows[i]?.device)
    if (isSame) return
    this.rows = tiers.map(tier => this.rows.find(row => row.device === tier.device) ?? makeRow(this.t, tier))
    replace(this.element, ...this.rows.map(row => row.element), this.scaleRow)
  }

  private showScale(scale: number, pixels: number): void {
    const step = stepOf(scale)
    this.element.style.setProperty('--step', share(step, scale))
    const marks = []
    for (let bytes = 0; bytes <= scale; bytes += step) {
      const isNearEnd = pixels * (1 - bytes / scale) < 30
      const text = bytes && !isNearEnd ? formatBytes(bytes).replace('.0 ', ' ') : ''
      marks.push(h('span', { style: `left:${share(bytes, scale)}` }, bytes ? text : '0'))
    }
    replace(this.track, ...marks)
  }
}

function makeRow(t: Translate, { device }: TierState): TierRow {
  const title = deviceTitle(t, device)
  const link = makeLink(t, device)
  const name = makeName(t, title)
  const bar = makeBar(t, title)
  const counts = makeCounts(t)
  const slot = h('div', { class: 'budget-slot' })
  const element = h(
    'div', { class: 'tier', 'data-device': device }, link.element,
    h('div', { class: 'row' }, name.element, bar.element, counts.element), slot,
  )
  return {
    device, element, slot,
    list: bar.list,
    show(scene, tier, scale, pixels) {
      link.show(scene.plan, scale)
      name.show(tier)
      bar.show(scene, tier, scale, pixels)
      counts.show(scene, tier)
    },
    showNow: counts.showLeft,
  }
}

function makeName(t: Translate, title: string): { element: HTMLElement; show: (tier: TierState) => void } {
  const name = h('div', { class: 'muted small' })
  const size = h('div', { class: 'muted small num' })
  return {
    element: h('div', { class: 'name' }, h('b', {}, title), name, size),
    show(tier) {
      setText(name, tierName(t, tier))
      setText(size, tierSize(t, tier))
    },
  }
}

interface Bar {
  element: HTMLElement
  list: BlockList
  show: (scene: Scene, tier: TierState, scale: number, pixels: number) => void
}

function makeBar(t: Translate, title: string): Bar {
  const list = new BlockList(t, t('mapBlocksIn', { where: title }))
  const parts = h('div', { class: 'parts', role: 'img' })
  const bar = h('div', { class: 'bar' }, list.element, parts)
  const end = h('div', { class: 'ends' })
  return {
    element: h('div', { class: 'field' }, h('div', { class: 'track' }, bar, end)),
    list,
    show(scene, tier, scale, pixels) {
      showBar(bar, tier, scale)
      showBlocks(list, scene, tier, scale, pixels)
      showParts(t, parts, tier, scale, pixels)
      replace(end, ...makeEnd(t, tier, scale))
      setAttribute(bar, 'data-hint', tier.can_hold && !shownBytes(tier) ? t('editDropHere') : '')
    },
  }
}

interface Counts {
  element: HTMLElement
  show: (scene: Scene, tier: TierState) => void
  /** Only what is left, and what the loaded model uses. */
  showLeft: (scene: Scene, tier: TierState) => void
}

function makeCounts(t: Translate): Counts {
  const planned = h('b')
  const change = h('span', { class: 'small change' })
  const left = h('div', { class: 'small' })
  const showLeft = (scene: Scene, tier: TierState) => {
    setText(left, leftWords(t, scene.plan, tier, heldNow(scene, tier.device)))
    setClass(left, `small ${tier.spare < 0 ? 'lacks' : 'muted'}`)
  }
  return {
    element: h('div', { class: 'counts num' }, h('div', {}, planned, change), left),
    show(scene, tier) {
      setText(planned, formatBytes(tier.planned))
      setText(change, changeWords(scene, tier))
      showLeft(scene, tier)
    },
    showLeft,
  }
}

/** What the loaded model uses of a device by purpose; of what is only proposed nothing is used. */
function heldNow({ base }: Scene, device: string): Record<string, number> {
  return base.tiers.find(tier => tier.device === device)?.now ?? {}
}

/** What a proposal adds to a tier or takes from it: `" +1.5 GiB"`. */
function changeWords(scene: Scene, tier: TierState): string {
  const before = scene.base.tiers.find(other => other.device === tier.device)
  const more = before ? tier.planned - before.planned : 0
  if (scene.plan === scene.base || !more) return ''
  return ` ${more > 0 ? '+' : '−'}${formatBytes(Math.abs(more))}`
}

function showBar(bar: HTMLElement, tier: TierState, scale: number): void {
  const shown = shownBytes(tier)
  const kinds = [tier.is_whole ? 'whole' : 'cut', tier.spare < 0 ? 'over' : '', shown ? '' : 'empty']
  setClass(bar, `bar ${kinds.filter(Boolean).join(' ')}`)
  bar.style.width = share(shown, scale)
}

function showBlocks(list: BlockList, scene: Scene, tier: TierState, scale: number, pixels: number): void {
  const blocks = blocksIn(scene.plan, tier.device)
  const bytes = blocks.reduce((sum, block) => sum + homeBytes(block), 0)
  const hasRoom = roomForSigns(list, blocks, scale, pixels)
  list.show(scene, blocks, block => (hasRoom(block) ? shortLabel(block.label) : ''))
  list.element.style.width = share(bytes, shownBytes(tier))
  for (const block of blocks) {
    const cell = list.cell(block.label)
    if (!cell) continue
    cell.style.width = share(homeBytes(block), bytes)
    cell.classList.toggle('thin', (homeBytes(block) / scale) * pixels < 5)
    cell.classList.toggle('markless', (homeBytes(block) / scale) * pixels < 8)
  }
}

/**
 * Which blocks are wide enough for their numbers, turned where that helps.
 *
 * A tier shows the numbers of all its layers or of none: some alone would look as if others were missing.
 */
function roomForSigns(list: BlockList, blocks: BlockState[], scale: number, pixels: number): (block: BlockState) => boolean {
  const width = (block: BlockState) => (homeBytes(block) / scale) * pixels
  const lies = (block: BlockState) => width(block) >= PIXELS_OF_SIGN * shortLabel(block.label).length + 3
  const stands = (block: BlockState) => width(block) >= PIXELS_OF_TURNED_SIGN
  const layers = blocks.filter(block => block.kind === 'decoder' || block.kind === 'encoder')
  const isTurned = !layers.every(lies)
  list.element.classList.toggle('turned', isTurned)
  if (!isTurned) return lies
  return layers.every(stands) ? stands : () => false
}

/** What is in a tier beside blocks: one place for the Tab key, which says all of it. */
function showParts(t: Translate, element: HTMLElement, tier: TierState, scale: number, pixels: number): void {
  const parts = partsOf(tier)
  const bytes = parts.reduce((sum, part) => sum + part.bytes, 0)
  element.hidden = !parts.length
  element.style.width = share(bytes, shownBytes(tier))
  element.tabIndex = parts.length ? 0 : -1
  setAttribute(element, 'aria-label', `${deviceTitle(t, tier.device)}: ${partsWords(t, tier).join(t('mapComma'))}`)
  replace(element, ...parts.map(part => makePart(t, part, tier.device, bytes, (part.bytes / scale) * pixels)))
}

function makePart(t: Translate, part: Part, device: string, whole: number, pixels: number): HTMLElement {
  const { purpose, bytes } = part
  const label = purposeWords(t, purpose)
  // Twelve pixels hold any letter of ten pixels, Japanese ones as well.
  const hasRoom = pixels >= [...label].reduce((sum, letter) => sum + (letter > '\u2fff' ? 11 : 6), 8)
  return h(
    'span', {
      class: `part fill-${fillOfPart(purpose)} is-${purpose}`, style: `width:${share(bytes, whole)}`,
      'data-tip': partWords(t, purpose, bytes, device),
    },
    hasRoom && h('span', { class: 'tag' }, label),
  )
}

/** Where a device ends, across a bar that runs past it. */
function makeEnd(t: Translate, tier: TierState, scale: number): HTMLElement[] {
  const end = endOf(tier)
  const more = h('span', { class: 'more muted', style: `left:${share(tier.planned, scale)}`, 'aria-hidden': 'true' }, '…')
  const rest = tier.is_whole || !tier.planned ? [] : [more]
  if (!end) return rest
  const words = t(end.isLimit ? 'mapLimitHere' : 'mapEndsHere', {
    device: deviceTitle(t, tier.device), size: formatBytes(end.bytes),
  })
  const left = share(end.bytes, scale)
  const beyond = share(tier.planned - end.bytes, scale)
  const isRight = end.bytes > scale / 2
  return [
    h('span', { class: 'beyond-end', style: `left:${left};width:${beyond}`, 'aria-hidden': 'true' }),
    h('span', { class: `end ${isRight ? 'is-right' : ''}`, style: `left:${left}` }, h('span', {}, words)),
    ...rest,
  ]
}

/** What travels up from a tier: a lane as wide as its bytes are at the scale of the bars. */
function makeLink(t: Translate, device: string): { element: HTMLElement; show: (plan: PlanState, scale: number) => void } {
  const lane = h('div', { class: 'lane', 'aria-hidden': 'true' })
  const words = h('span', { class: 'small num' })
  const element = h('div', { class: 'row link' }, h('div'),
    h('div', { class: 'field' }, h('div', { class: 'track' }, lane, h('div', { class: 'traffic' }, words))), h('div'))
  return {
    element,
    show(plan, scale) {
      const traffic = trafficFrom(plan, device)
      element.hidden = !traffic
      if (!traffic) return
      lane.style.width = share(traffic.bytes, scale)
      setText(words, `↑ ${trafficWords(t, plan, device)}`)
    },
  }
}

/** All words of a tier's parts, for a tooltip. */
export function tierLines(t: Translate, scene: Scene, tier: TierState): string[] {
  const where = onDevice(t, tier.device)
  return [
    deviceTitle(t, tier.device), `${tierName(t, tier)} · ${tierSize(t, tier)}`,
    ...partsOf(tier).map(({ purpose, bytes }) => `${purposeWords(t, purpose)}: ${formatBytes(bytes)}`),
    ...Object.entries(heldNow(scene, tier.device)).map(([purpose, bytes]) =>
      t('mapNowPart', { name: heldWords(t, purpose), size: formatBytes(bytes), where })),
  ]
}
